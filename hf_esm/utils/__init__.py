"""What every wing may use and that knows nothing of models: processes, devices, folders, fingerprints, sizes."""
