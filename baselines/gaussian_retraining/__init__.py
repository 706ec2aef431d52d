"""Full randomized-smoothing retraining (Cohen et al. 2019)."""
