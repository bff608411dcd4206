#include "start.h"

static int count;
static char **arguments;

// glibc hands constructors what it hands to main.
__attribute__((constructor)) static void keep_arguments(int argc, char **argv) {
    count = argc;
    arguments = argv;
}

int qcowfs_argument_count(void) { return count; }

const char *qcowfs_argument(int index) { return arguments[index]; }
