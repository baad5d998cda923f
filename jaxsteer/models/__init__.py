"""The transformer: configs, parameters, sites, taps, decoding, sharding."""
