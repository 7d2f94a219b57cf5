"""A hub in a box: the Hugging Face Hub protocol over bare git repositories with an LFS object store.

    app          ASGI: who asks, for what -> the row of the table that answers
    routing      the table's language: raw paths, split before they are unquoted
    api          JSON: repositories, branches, commits, trees      content   files and LFS objects, by ranges
    git_http     `git clone`                                       pages     what a browser sees
    store        one folder of repositories    repository   git: trees, commits, refs    lfs   large files
    accounts     tokens and rights             names        what may be a name           refusal   HTTP errors

One process serves one root. Everything is on the disk before a branch points to it, and a branch moves by one
rename, so a crash leaves the old commit or the new one. Knows nothing of models.
"""
