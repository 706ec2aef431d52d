"""Black-box PEFTSmoothing (Fu & Wang 2024): a prompt in front of a model that is only queried."""
