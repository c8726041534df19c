"""A model that routes each sample to experts: loading, predicting, editing, saving."""
