// The door to nettle, which has the ciphers of old disks that libcrypto has not.
#pragma once
#include <nettle/cbc.h>
#include <nettle/ctr.h>
#include <nettle/nettle-meta.h>
#include <nettle/pbkdf2.h>
#include <nettle/sha2.h>
#include <nettle/xts.h>
#include <string.h>

// Newer releases spell the names of these tables as macros over functions, and Swift takes a C
// table with pointers in it for shared state: they are handed out by number of the family.
enum qcowfs_cipher_family { QCOWFS_AES, QCOWFS_CAST5, QCOWFS_SERPENT, QCOWFS_TWOFISH };

// The cipher of a family that takes keys of `key_bytes`, NULL where there is none.
static inline const struct nettle_cipher *qcowfs_cipher(enum qcowfs_cipher_family family,
                                                        size_t key_bytes) {
    switch (family) {
    case QCOWFS_AES:
        return key_bytes == 16   ? &nettle_aes128
               : key_bytes == 24 ? &nettle_aes192
               : key_bytes == 32 ? &nettle_aes256
                                 : NULL;
    case QCOWFS_CAST5:
        return key_bytes == 16 ? &nettle_cast128 : NULL;
    case QCOWFS_SERPENT:
        return key_bytes == 16   ? &nettle_serpent128
               : key_bytes == 24 ? &nettle_serpent192
               : key_bytes == 32 ? &nettle_serpent256
                                 : NULL;
    case QCOWFS_TWOFISH:
        return key_bytes == 16   ? &nettle_twofish128
               : key_bytes == 24 ? &nettle_twofish192
               : key_bytes == 32 ? &nettle_twofish256
                                 : NULL;
    }
    return NULL;
}
