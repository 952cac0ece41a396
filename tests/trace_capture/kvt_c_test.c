/* The header is C99, and every function can be called from it. */
#include <stdio.h>
#include <string.h>

#include "kvt.h"

static int failures = 0;

static void expect(int holds, const char* what) {
  if (!holds) {
    fprintf(stderr, "does not hold: %s (last error: %s)\n", what, kvt_last_error());
    ++failures;
  }
}

int main(int argc, char** argv) {
  const char* meta =
      "{\"model\": {\"name\": \"c\", \"n_layers\": 1, \"n_heads\": 1, \"n_kv_heads\": 1, \"head_dim\": 2,"
      " \"attention_scale\": 1}, \"prompt_len\": 1, \"capacity\": 3, \"element\": \"f32\", \"logprobs\": true}";
  const float values[] = {1, 2, 3, 4};
  const int32_t ids[] = {7, 8};
  const float logprobs[] = {-1, -2};
  kvt_trace* trace = NULL;
  kvt_rows rows;
  memset(&rows, 0, sizeof rows);
  rows.dtype = KVT_F32;
  rows.data = values;
  rows.stride_token = 2 * (int64_t)sizeof(float);
  if (argc != 2) {
    return 2;
  }
  expect(strcmp(kvt_last_error(), "") == 0, "no error before the first");
  expect(strlen(kvt_version()) > 0, "there is a version");
  expect(kvt_open(argv[1], meta, &trace) == KVT_OK, "open");
  expect(kvt_append(trace, 0, KVT_K, 0, 2, &rows) == KVT_OK, "append k");
  expect(kvt_append(trace, 0, KVT_V, 0, 2, &rows) == KVT_OK, "append v");
  expect(kvt_commit(trace, 2, ids, logprobs) == KVT_USAGE, "queries are missing");
  expect(strstr(kvt_last_error(), "layer 0 has no q of token 0") != NULL, "the sentence names them");
  expect(kvt_append(trace, 0, KVT_Q, 0, 2, &rows) == KVT_OK, "append q");
  expect(kvt_commit(trace, 2, ids, logprobs) == KVT_OK, "commit");
  expect(kvt_close(trace, 1) == KVT_OK, "close");
  expect(kvt_close(trace, 1) == KVT_USAGE, "a closed handle is refused");
  expect(kvt_append(NULL, 0, KVT_K, 0, 2, &rows) == KVT_USAGE, "NULL is refused");
  return failures == 0 ? 0 : 1;
}
