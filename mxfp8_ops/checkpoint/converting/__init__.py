"""From one checkpoint to another: quantized, dequantized, or in another dialect."""
