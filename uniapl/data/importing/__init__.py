"""Import of a user's own data into Arrow shards: sources of rows, formats of rows, and the import itself.

files, json_text, hub    where rows come from, one at a time
formats, conversations   what a row means: chat, sharegpt, alpaca, plain, preference, shard
values                   single values of a row, checked
rows                     a sound shard row with a stable id
shards, ledger, scan     files written whole, what an interrupted import has done, the held-out split
job, summary             all of it, and what is said at its end
"""
