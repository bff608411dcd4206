// What a program is started with.  Swift reads it from /proc, which a chroot may not have.
#pragma once

// How many words the program was called with, its own name included.
int qcowfs_argument_count(void);

// One of them.
const char *_Nonnull qcowfs_argument(int index);
