// The C ABI: handles, locks and error codes around a writer and a row collector.
#include "trace_capture/kvt.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>

#include "policies/errors.hpp"
#include "trace_capture/errors.hpp"
#include "trace_capture/kvt_meta.hpp"
#include "trace_capture/row_collector.hpp"
#include "traces/errors.hpp"
#include "traces/writer.hpp"

namespace kvreplay {
namespace {

// Creating and closing a file goes through the HDF5 library, which knows one thread at a time.
std::mutex hdf5_mutex;

class OpenTrace {
 public:
  OpenTrace(const std::filesystem::path& path, const TraceRequest& request)
      : info_(request.info),
        capacity_(request.capacity),
        has_logprobs_(request.options.logprob),
        writer_(path, request.info, request.capacity, request.options),
        rows_(request.info, request.capacity, request.options, writer_) {}

  void append(int layer, kvt_kind kind, std::int64_t first, std::int64_t n, const kvt_rows& rows) {
    const std::lock_guard lock(mutex_);
    guard_file([&] { rows_.append(layer, kind, first, n, rows); });
  }

  void commit(std::int64_t n, const std::int32_t* ids, const float* logprobs) {
    const std::lock_guard lock(mutex_);
    guard_file([&] {
      check_commit(n, ids, logprobs);
      if (n == 0) {
        return;
      }
      const auto count = static_cast<std::size_t>(n);
      std::vector<float> unknown;
      if (has_logprobs_ && logprobs == nullptr) {
        unknown.assign(count, std::nanf(""));
        logprobs = unknown.data();
      }
      writer_.append_tokens({ids, count}, {}, has_logprobs_ ? std::span(logprobs, count) : std::span<const float>());
      writer_.commit(n_tokens_ + static_cast<Pos>(n));
      n_tokens_ += static_cast<Pos>(n);
    });
  }

  void close(bool keep) {
    const std::lock_guard lock(mutex_);
    const std::lock_guard hdf5_lock(hdf5_mutex);
    closed_ = true;
    if (!keep || n_tokens_ == 0) {
      writer_.discard();
    } else {
      writer_.close();
    }
    if (keep && n_tokens_ == 0) {
      throw ConfigError("no token was committed, so there is no trace to keep, and the unfinished file is removed");
    }
  }

 private:
  void check_commit(std::int64_t n, const std::int32_t* ids, const float* logprobs) const {
    if (n < 0 || n > capacity_ - n_tokens_) {
      throw ConfigError(
          fmt::format("{} more tokens cannot be committed: {} of the capacity of {} are", n, n_tokens_, capacity_));
    }
    if (n > 0 && ids == nullptr) {
      throw ConfigError("ids is NULL");
    }
    if (logprobs != nullptr && !has_logprobs_) {
      throw ConfigError("logprobs were given, but the description does not ask for them; say \"logprobs\": true there");
    }
    for (std::int64_t i = 0; i < n; ++i) {
      if (ids[i] < 0) {
        throw ConfigError(fmt::format("ids[{}] is {}, but a token id is 0 or more", i, ids[i]));
      }
      if (logprobs != nullptr && logprobs[i] > 1e-3F) {  // rounding may leave a little more than 0
        throw ConfigError(
            fmt::format("logprobs[{}] is {}, but the logarithm of a probability is 0 or less", i, logprobs[i]));
      }
    }
    rows_.expect_complete(n_tokens_ + n);
  }

  // After the file failed once nobody knows what is in it beyond the last commit.
  template <typename Call>
  void guard_file(Call&& call) {
    if (closed_) {
      throw ConfigError("this handle was closed by another thread");
    }
    if (!failure_.empty()) {
      throw TraceError("the trace failed before: " + failure_);
    }
    try {
      call();
    } catch (const TraceError& error) {
      failure_ = error.what();
      throw;
    }
  }

  std::mutex mutex_;
  TraceInfo info_;
  Pos capacity_ = 0, n_tokens_ = 0;
  bool has_logprobs_ = false, closed_ = false;
  std::string failure_;
  TraceWriter writer_;
  RowCollector rows_;
};

// A handle is a number that is given once, so that a stale one is an error and never another trace. What is still open
// when the process ends is left as it is, for `kvreplay recover`: nothing here is ever destroyed.
class Handles {
 public:
  static Handles& all() {
    static Handles& handles = *new Handles;
    return handles;
  }

  kvt_trace* open(const std::filesystem::path& path, const TraceRequest& request) {
    std::error_code ignored;
    const std::string name = std::filesystem::weakly_canonical(std::filesystem::absolute(path, ignored), ignored);
    {
      const std::lock_guard lock(mutex_);
      if (!names_.insert(name).second) {
        throw ConfigError(path.string() + " is being written already, by another handle of this process");
      }
    }
    try {
      std::shared_ptr<OpenTrace> trace;
      {
        const std::lock_guard lock(hdf5_mutex);
        trace = std::make_shared<OpenTrace>(path, request);
      }
      const std::lock_guard lock(mutex_);
      traces_[++last_] = {std::move(trace), name};
      return reinterpret_cast<kvt_trace*>(last_);
    } catch (...) {
      release(name);
      throw;
    }
  }

  std::shared_ptr<OpenTrace> at(const kvt_trace* handle) {
    const std::lock_guard lock(mutex_);
    return find(handle)->second.trace;
  }

  void close(const kvt_trace* handle, bool keep) {
    Entry entry;
    {
      const std::lock_guard lock(mutex_);
      entry = std::move(traces_.extract(find(handle)).mapped());
    }
    try {
      entry.trace->close(keep);
    } catch (...) {
      release(entry.name);
      throw;
    }
    release(entry.name);
  }

 private:
  struct Entry {
    std::shared_ptr<OpenTrace> trace;
    std::string name;
  };
  using Map = std::map<std::uintptr_t, Entry>;

  Map::iterator find(const kvt_trace* handle) {
    if (handle == nullptr) {
      throw ConfigError("trace is NULL; pass what kvt_open gave");
    }
    const auto at = traces_.find(reinterpret_cast<std::uintptr_t>(handle));
    if (at == traces_.end()) {
      throw ConfigError("this handle is not open: it was closed, or kvt_open did not give it");
    }
    return at;
  }

  void release(const std::string& name) {
    const std::lock_guard lock(mutex_);
    names_.erase(name);
  }

  std::mutex mutex_;
  std::uintptr_t last_ = 0;
  Map traces_;
  std::set<std::string> names_;  // of the files being written
};

thread_local std::string last_error;
thread_local bool out_of_memory = false;  // no memory even for the sentence

kvt_status fail(kvt_status status, const char* sentence) noexcept {
  try {
    out_of_memory = false;
    last_error = sentence;
  } catch (...) {
    out_of_memory = true;
  }
  return status;
}

// Nothing is thrown through C.
template <typename Call>
kvt_status guarded(Call&& call) noexcept {
  try {
    call();
    return KVT_OK;
  } catch (const ConfigError& error) {
    return fail(KVT_USAGE, error.what());
  } catch (const std::invalid_argument& error) {
    return fail(KVT_USAGE, error.what());
  } catch (const TraceError& error) {
    return fail(KVT_TRACE, error.what());
  } catch (const DeviceError& error) {
    return fail(KVT_DEVICE, error.what());
  } catch (const std::bad_alloc&) {
    return fail(KVT_ERROR, "out of memory");
  } catch (const std::exception& error) {
    return fail(KVT_ERROR, error.what());
  } catch (...) {
    return fail(KVT_ERROR, "unknown error");
  }
}

}  // namespace
}  // namespace kvreplay

using kvreplay::ConfigError;
using kvreplay::guarded;
using kvreplay::Handles;

extern "C" {

kvt_status kvt_open(const char* path, const char* meta_json, kvt_trace** trace) {
  if (trace != nullptr) {
    *trace = nullptr;
  }
  return guarded([&] {
    if (path == nullptr || meta_json == nullptr || trace == nullptr) {
      throw ConfigError(fmt::format("{} is NULL", path == nullptr        ? "path"
                                                  : meta_json == nullptr ? "meta_json"
                                                                         : "trace"));
    }
    if (*path == '\0') {
      throw ConfigError("path is empty");
    }
    kvreplay::TraceRequest request = kvreplay::read_meta(meta_json);
    if (request.info.generator.empty()) {
      request.info.generator = fmt::format(R"({{"tool": "libkvt", "version": "{}"}})", KVREPLAY_VERSION);
    }
    *trace = Handles::all().open(path, request);
  });
}

kvt_status kvt_append(kvt_trace* trace, int32_t layer, kvt_kind kind, int64_t first, int64_t n, const kvt_rows* rows) {
  return guarded([&] {
    if (rows == nullptr) {
      throw ConfigError("rows is NULL");
    }
    Handles::all().at(trace)->append(layer, kind, first, n, *rows);
  });
}

kvt_status kvt_commit(kvt_trace* trace, int64_t n, const int32_t* ids, const float* logprobs) {
  return guarded([&] { Handles::all().at(trace)->commit(n, ids, logprobs); });
}

kvt_status kvt_close(kvt_trace* trace, int32_t keep) {
  return guarded([&] { Handles::all().close(trace, keep != 0); });
}

const char* kvt_last_error(void) { return kvreplay::out_of_memory ? "out of memory" : kvreplay::last_error.c_str(); }

const char* kvt_version(void) { return KVREPLAY_VERSION; }
}
