"""The processes of this host: planned, started, watched, restarted."""
