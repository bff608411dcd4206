// The door to libzstd: its headers as they are.
#pragma once
#include <zstd.h>
#include <zstd_errors.h>
