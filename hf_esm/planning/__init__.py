"""What a merge will do, found out from headers: the caller's arguments in, a checked `MergePlan` out."""
