"""What calibration text does inside the model: activations between blocks, statistics of matrix inputs."""
