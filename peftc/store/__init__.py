"""Storage: atomic directories, manifests, delta files, fingerprints."""
