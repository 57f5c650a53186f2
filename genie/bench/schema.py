"""Version of the keys in ``extra_info`` (docs/comparing.md lists them); imports nothing."""

#: raised when a key is added; no key ever changes its meaning
SCHEMA_VERSION = 3
#: that can still be read: what was added since is absent there
OLDEST_READABLE = 2
