"""What a score is: labelled rows and a model's outputs in, numbers and pictures out."""
