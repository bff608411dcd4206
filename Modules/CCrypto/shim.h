// The door to libcrypto, OpenSSL's library of ciphers and hashes.
//
// The library is opened when the first encrypted image asks for it, not when the program starts:
// loading it takes a millisecond, which is a fifth of a mount. Its functions are called through
// wrappers, which answer as a failing one does (0 or NULL) where there is no such library.
#pragma once
#include <dlfcn.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/opensslv.h>
#include <openssl/rand.h>

#define CRYPTO_TEXT(number) CRYPTO_TEXT_OF(number)
#define CRYPTO_TEXT_OF(number) #number

static inline void *crypto_symbol(const char *name) {
    static void *library;
    void *opened = __atomic_load_n(&library, __ATOMIC_ACQUIRE);
    if (!opened) {
        opened = dlopen("libcrypto.so." CRYPTO_TEXT(OPENSSL_SHLIB_VERSION), RTLD_NOW | RTLD_LOCAL);
        __atomic_store_n(&library, opened, __ATOMIC_RELEASE);
    }
    return opened ? dlsym(opened, name) : 0;
}

// The address of a function, looked up once. Threads that do it at one time find the same.
#define CRYPTO_FUNCTION(name)                                                                      \
    static void *address;                                                                          \
    __typeof__(&name) function = (__typeof__(&name))__atomic_load_n(&address, __ATOMIC_ACQUIRE);   \
    if (!function) {                                                                               \
        function = (__typeof__(&name))crypto_symbol(#name);                                        \
        __atomic_store_n(&address, (void *)function, __ATOMIC_RELEASE);                            \
    }

#define CRYPTO_DOOR(result, name, parameters, arguments)                                           \
    static inline result crypto_##name parameters {                                                \
        CRYPTO_FUNCTION(name)                                                                      \
        return function ? function arguments : 0;                                                  \
    }

#define CRYPTO_FREEING_DOOR(name, type)                                                            \
    static inline void crypto_##name(type *what) {                                                 \
        CRYPTO_FUNCTION(name)                                                                      \
        if (function) function(what);                                                              \
    }

CRYPTO_DOOR(EVP_CIPHER *, EVP_CIPHER_fetch,
            (OSSL_LIB_CTX * library, const char *name, const char *properties),
            (library, name, properties))
CRYPTO_FREEING_DOOR(EVP_CIPHER_free, EVP_CIPHER)
CRYPTO_DOOR(int, EVP_CIPHER_get_key_length, (const EVP_CIPHER *cipher), (cipher))
CRYPTO_DOOR(EVP_CIPHER_CTX *, EVP_CIPHER_CTX_new, (void), ())
CRYPTO_FREEING_DOOR(EVP_CIPHER_CTX_free, EVP_CIPHER_CTX)
CRYPTO_DOOR(int, EVP_CIPHER_CTX_reset, (EVP_CIPHER_CTX * context), (context))
CRYPTO_DOOR(int, EVP_CIPHER_CTX_set_padding, (EVP_CIPHER_CTX * context, int pads), (context, pads))
CRYPTO_DOOR(int, EVP_CIPHER_CTX_copy, (EVP_CIPHER_CTX * to, const EVP_CIPHER_CTX *from), (to, from))
CRYPTO_DOOR(int, EVP_CipherInit_ex,
            (EVP_CIPHER_CTX * context, const EVP_CIPHER *cipher, ENGINE *engine,
             const unsigned char *key, const unsigned char *iv, int encrypts),
            (context, cipher, engine, key, iv, encrypts))
CRYPTO_DOOR(int, EVP_CipherInit_ex2,
            (EVP_CIPHER_CTX * context, const EVP_CIPHER *cipher, const unsigned char *key,
             const unsigned char *iv, int encrypts, const OSSL_PARAM *parameters),
            (context, cipher, key, iv, encrypts, parameters))
CRYPTO_DOOR(int, EVP_CipherUpdate,
            (EVP_CIPHER_CTX * context, unsigned char *to, int *count, const unsigned char *from,
             int byteCount),
            (context, to, count, from, byteCount))
CRYPTO_DOOR(EVP_MD *, EVP_MD_fetch,
            (OSSL_LIB_CTX * library, const char *name, const char *properties),
            (library, name, properties))
CRYPTO_FREEING_DOOR(EVP_MD_free, EVP_MD)
CRYPTO_DOOR(EVP_MD_CTX *, EVP_MD_CTX_new, (void), ())
CRYPTO_FREEING_DOOR(EVP_MD_CTX_free, EVP_MD_CTX)
CRYPTO_DOOR(int, EVP_DigestInit_ex2,
            (EVP_MD_CTX * context, const EVP_MD *digest, const OSSL_PARAM *parameters),
            (context, digest, parameters))
CRYPTO_DOOR(int, EVP_DigestUpdate, (EVP_MD_CTX * context, const void *bytes, size_t count),
            (context, bytes, count))
CRYPTO_DOOR(int, EVP_DigestFinal_ex,
            (EVP_MD_CTX * context, unsigned char *digest, unsigned int *count),
            (context, digest, count))
CRYPTO_DOOR(int, PKCS5_PBKDF2_HMAC,
            (const char *passphrase, int passphraseCount, const unsigned char *salt, int saltCount,
             int rounds, const EVP_MD *digest, int keyCount, unsigned char *key),
            (passphrase, passphraseCount, salt, saltCount, rounds, digest, keyCount, key))
CRYPTO_DOOR(int, RAND_priv_bytes, (unsigned char *bytes, int count), (bytes, count))
