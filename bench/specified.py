"""Settings of the specified network (spec model.md, the shared checkpoint) where the script's defaults have moved on."""
SPECIFIED = {"NUM_HEADS": "8", "NUM_KV_HEADS": "4", "ROPE_DIMS": "16", "PARALLEL_START_LAYER": "8"}
