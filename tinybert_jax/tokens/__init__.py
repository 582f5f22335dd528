"""Token stores on disk: `tinybert data prepare` writes a store once, training reads it."""
