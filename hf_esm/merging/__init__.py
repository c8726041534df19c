"""The merge itself: a plan in, the folder of a merged model out."""
