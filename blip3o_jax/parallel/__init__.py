"""Place arrays and processes on devices: meshes, sharding rules, hosts and memory."""
