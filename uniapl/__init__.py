"""UniAPL: the method and its contracts, with no dependency on Ray, vLLM or DeepSpeed."""
