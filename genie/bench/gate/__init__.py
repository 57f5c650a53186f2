"""The regression gate: `genie gate`."""
