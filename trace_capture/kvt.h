/* Writes a kvtrace from any engine that can call C: open, append rows as they are computed, commit, close.
   docs/capture_abi.md explains it with an example. */
#ifndef KVREPLAY_KVT_H
#define KVREPLAY_KVT_H
#include <stdint.h>

#if defined(__GNUC__)
#define KVT_API __attribute__((visibility("default")))
#else
#define KVT_API
#endif

/* In C++ a value that no enumerator names is refused like any other mistake, and not undefined behaviour. */
#ifdef __cplusplus
#define KVT_ENUM(name) enum name : int32_t
extern "C" {
#else
#define KVT_ENUM(name) enum name
#endif

/* A handle. Every function may be called from any thread; calls on one handle take turns. A handle that was closed, or
   never was one, is refused and never taken for another trace. */
typedef struct kvt_trace kvt_trace;

/* The numbers are the exit codes of the commands. */
typedef KVT_ENUM(kvt_status) {
  KVT_OK = 0,
  KVT_ERROR = 1, /* out of memory, or our own mistake */
  KVT_USAGE = 2, /* the call cannot be right; it changed nothing */
  KVT_TRACE = 3, /* the file cannot be written: a handle that said so refuses everything but kvt_close */
  KVT_DEVICE = 4 /* device memory cannot be read */
} kvt_status;

typedef KVT_ENUM(kvt_dtype) { KVT_F16 = 0, KVT_BF16 = 1, KVT_F32 = 2 } kvt_dtype;

/* As they enter attention: keys and queries after QK-norm and RoPE, before the softmax scale. KVT_OUT is what attention
   gives back, before the output projection. Heads: n_kv_heads for keys and values, n_heads for the other two; channels:
   head_dim for keys and queries, v_head_dim for the other two. */
typedef KVT_ENUM(kvt_kind) { KVT_K = 0, KVT_V = 1, KVT_Q = 2, KVT_OUT = 3 } kvt_kind;

/* Rows of one layer and kind, channels side by side: element [head][token][channel] is at
   data + head * stride_head + token * stride_token + channel * element size. Strides are in bytes, need no alignment,
   and may be negative in host memory; rows that would overlap are refused, and a stride over a single head or token
   may be anything. Values are converted to the element type of the file, to nearest even; what is not finite, or does
   not fit (float16 ends at 65504), is refused with its place. */
typedef struct {
  kvt_dtype dtype;
  const void* data;
  int64_t stride_head, stride_token;
  int32_t on_device; /* 0 = host memory, 1 = CUDA device memory */
  void* stream;      /* cudaStream_t: rows are read after what it holds already; NULL = the default stream */
} kvt_rows;

/* Creates PATH.part with room for the capacity. meta_json: an object that describes the model and what is recorded;
   docs/capture_abi.md lists its keys. On failure *trace becomes NULL. */
KVT_API kvt_status kvt_open(const char* path, const char* meta_json, kvt_trace** trace);

/* The next n tokens of one layer and kind, beginning with token `first`. Kinds and layers come in any order and any
   pieces; the tokens of each ascend without a gap. Of KVT_Q and KVT_OUT only the tokens that the file stores are kept,
   and only these have to come. The rows have been read when the call returns. */
KVT_API kvt_status kvt_append(kvt_trace* trace, int32_t layer, kvt_kind kind, int64_t first, int64_t n,
                              const kvt_rows* rows);

/* The ids of the next n tokens, all of whose rows were appended; they survive a crash from here on. Each call waits for
   the disk, so commit about once a second. logprobs: natural logarithms, or NULL = not known; only where the
   description asks for "logprobs". */
KVT_API kvt_status kvt_commit(kvt_trace* trace, int64_t n, const int32_t* ids, const float* logprobs);

/* Frees the handle, also where it fails. keep = 1 gives the file its final name: it holds the committed tokens (at least
   one); where that fails, PATH.part stays for `kvreplay recover`. keep = 0 removes it. */
KVT_API kvt_status kvt_close(kvt_trace* trace, int32_t keep);

/* The sentence that belongs to the last error of the calling thread, or "". Valid until that thread's next error. */
KVT_API const char* kvt_last_error(void);

KVT_API const char* kvt_version(void);

#ifdef __cplusplus
}
#endif
#endif
