"""Settings of the specified network (spec model.md, the shared checkpoint) where the script's defaults have moved on."""
SPECIFIED = {"PARALLEL_START_LAYER": "8"}
