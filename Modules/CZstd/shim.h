// The door to libzstd: its header as it is.
#pragma once
#include <zstd.h>
