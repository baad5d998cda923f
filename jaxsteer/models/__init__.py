"""The transformer and everything needed to open one: configs, weights, sharding, sites."""
