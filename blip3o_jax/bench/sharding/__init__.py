"""Compile the train step for TPU topologies without TPUs, strategy by strategy."""
