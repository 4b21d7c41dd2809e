"""HTTP: bytes of a socket become exchanges, exchanges become orders or small answers."""
