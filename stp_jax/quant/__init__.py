"""From a Flax model and a policy to an STP model, through Flax's public hooks only."""
