"""The bytes of quantised linears: pack, unpack, shapes and config keys. Nothing else knows a bit layout."""
