"""Tokens, and which addresses a server may listen on."""

import pytest

from genie.errors import AuthError, ConfigError
from genie.wire import auth


def test_macs_depend_on_token_role_and_nonce():
    nonce = auth.new_nonce()
    macs = {
        auth.client_mac("a", nonce),
        auth.server_mac("a", nonce),
        auth.client_mac("b", nonce),
        auth.client_mac("a", b""),
    }
    assert len(macs) == 4
    assert auth.same_mac(auth.client_mac("a", nonce), auth.client_mac("a", nonce))


def test_the_token_comes_from_its_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(auth.TOKEN_VARIABLE, raising=False)
    assert auth.load_token(None) is None
    monkeypatch.setenv(auth.TOKEN_VARIABLE, "from the environment")
    assert auth.load_token(None) == "from the environment"
    file = tmp_path / "token"
    file.write_text(" from the file\n")
    file.chmod(0o600)
    assert auth.load_token(str(file)) == "from the file"


def test_bad_token_files_are_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        auth.load_token(str(tmp_path / "absent"))
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        auth.load_token(str(file))
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        auth.load_token(str(file))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_tls(host):
    auth.check_bind(host, token_given=False, tls=False, insecure=False)


@pytest.mark.parametrize(("token", "tls"), [(False, False), (True, False), (False, True)])
def test_other_addresses_need_token_and_tls(token, tls):
    for host in ("0.0.0.0", "::", "10.1.2.3", "gpu-host"):
        with pytest.raises(AuthError, match="--insecure"):
            auth.check_bind(host, token_given=token, tls=tls, insecure=False)
        auth.check_bind(host, token_given=token, tls=tls, insecure=True)
        auth.check_bind(host, token_given=True, tls=True, insecure=False)
