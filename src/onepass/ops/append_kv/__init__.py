"""append_kv: new keys and values into their caches, in place."""
