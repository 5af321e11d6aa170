"""Rollout engines: token ids in, sampled token ids and their log-probs out, with the weights of a known version."""
