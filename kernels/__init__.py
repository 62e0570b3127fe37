"""flexpert.kernels"""
