"""The `epd` command and its subcommands."""
