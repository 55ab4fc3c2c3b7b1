//! The gateway file: one TOML file of the gateway's own settings.
