"""The unified objective: its terms, advantages and counts. Blind to where tokens come from."""
