"""Token shards on disk: written once by `tinybert data prepare`, read by training."""
