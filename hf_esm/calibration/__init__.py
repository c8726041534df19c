"""What an expert's layers read on its samples: from a model and samples to `ActivationStatistics`."""
