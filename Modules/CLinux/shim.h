// The door to what Linux has and Swift's Glibc module leaves out: fstatfs.
#pragma once
#include <sys/statfs.h>
