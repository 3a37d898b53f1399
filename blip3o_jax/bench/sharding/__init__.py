"""The train step compiled for TPU topologies that are not there, strategy by strategy."""
