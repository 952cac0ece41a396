/* Writes a kvtrace from any engine that can call C: open, append rows as they are computed, commit, close. */
#ifndef KVREPLAY_KVT_H
#define KVREPLAY_KVT_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvt_trace kvt_trace;

typedef enum {
  KVT_OK = 0,
  KVT_ERROR = 1,
  KVT_USAGE = 2,
  KVT_TRACE = 3,
  KVT_DEVICE = 4
} kvt_status; /* as the exit codes */
typedef enum { KVT_F16 = 0, KVT_BF16 = 1, KVT_F32 = 2 } kvt_dtype;
typedef enum { KVT_K = 0, KVT_V = 1, KVT_Q = 2, KVT_OUT = 3 } kvt_kind;

/* Rows of one layer and kind: element [head][token][channel] is at data + head * stride_head + token * stride_token +
   channel * element size; strides in bytes. On a device (CUDA) the rows are read in the order of `stream`. */
typedef struct {
  kvt_dtype dtype;
  const void* data;
  int64_t stride_head, stride_token;
  int32_t on_device; /* 0 = host memory */
  void* stream;      /* cudaStream_t, NULL = the default stream; only where on_device */
} kvt_rows;

/* Creates `path`.part. meta_json: an object with the model's description, docs/capture.md lists its keys. */
kvt_status kvt_open(const char* path, const char* meta_json, kvt_trace** trace);
/* The next n tokens of one layer and kind, beginning with token `first`. Kinds and layers in any order; the tokens of
   each ascend without a gap. Of KVT_Q and KVT_OUT only the tokens that the file stores are kept. */
kvt_status kvt_append(kvt_trace* trace, int32_t layer, kvt_kind kind, int64_t first, int64_t n, const kvt_rows* rows);
/* The next n tokens' ids (and logprobs, or NULL): all their rows were appended. They survive a crash from here on. */
kvt_status kvt_commit(kvt_trace* trace, int64_t n, const int32_t* ids, const float* logprobs);
/* Gives the file its final name and frees the handle, also where it fails. keep = 0 removes the file instead. */
kvt_status kvt_close(kvt_trace* trace, int32_t keep);
/* The sentence that belongs to the last error of this thread, or "". */
const char* kvt_last_error(void);
const char* kvt_version(void);

#ifdef __cplusplus
}
#endif
#endif
