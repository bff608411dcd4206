// The door to libcrypto, OpenSSL's library of ciphers and hashes: its headers as they are.
#pragma once
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/rand.h>
