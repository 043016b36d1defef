"""A real language model reads small words in large photographs: coarse-only, Flex, everything visible."""
