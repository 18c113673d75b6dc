"""The processes around the engine: gateway, workers, supervisor, admin and command line."""
