#include <cublas_v2.h>
#include <cuda_runtime.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#include <ucontext.h>

#include <atomic>
#include <chrono>
#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "trace_capture/cuda/element.hpp"

namespace kvreplay::cuda {
alignas(16) thread_local float kvreplay_shared[emulation::kSharedBytes / sizeof(float)];
}

thread_local dim3 threadIdx, blockIdx;

// Streams are queues. An event is a place in one. Nothing runs before something waits for it, but in the streams that
// KVREPLAY_EMULATED_EAGER names (even or odd, in the order in which they were created): there everything runs at once.
// Where streams are not ordered as they should be, one of the two shows it.
struct CUstream_st {
  bool eager = false;
  std::deque<std::function<void()>> queue;
  std::uint64_t n_enqueued = 0, n_done = 0;
  bool running = false;
};
struct CUevent_st {
  CUstream_st* stream = nullptr;
  std::uint64_t place = 0;  // done once n_done of the stream has reached it
};
struct cublasContext {
  cudaStream_t stream = nullptr;
};

namespace kvreplay::emulation {
namespace {

const char* const eager = std::getenv("KVREPLAY_EMULATED_EAGER");  // NOLINT(concurrency-mt-unsafe): before main
std::recursive_mutex mutex;
std::atomic<std::uint64_t> n_enqueued_ever{0};
int device_count = 1;
std::size_t device_bytes = std::size_t{1} << 30, used_bytes = 0;
std::map<const std::byte*, std::size_t> device_memory, pinned_memory;  // begin, bytes
CUstream_st default_stream;

CUstream_st& stream_of(cudaStream_t stream) { return stream != nullptr ? *stream : default_stream; }

void run_until(CUstream_st& stream, std::uint64_t place) {
  while (stream.n_done < place) {
    if (stream.running) {
      throw std::logic_error("emulated CUDA: two streams wait for each other");
    }
    const std::function<void()> work = std::move(stream.queue.front());
    stream.queue.pop_front();
    stream.running = true;
    try {
      work();
    } catch (...) {
      ++stream.n_done;
      stream.running = false;
      throw;
    }
    ++stream.n_done;
    stream.running = false;
  }
}

bool inside(const std::map<const std::byte*, std::size_t>& memory, const void* data, std::size_t bytes) {
  const std::byte* begin = static_cast<const std::byte*>(data);
  auto at = memory.upper_bound(begin);
  return at != memory.begin() && begin + bytes <= (--at)->first + at->second;
}

// One thread of a block.
struct Fiber {
  std::unique_ptr<std::byte[]> stack;
  jmp_buf at;
  dim3 index;
  enum class State { ready, at_barrier, at_exchange, done } state = State::done;
  std::uint64_t given = 0;
};

constexpr std::size_t kStackBytes = std::size_t{128} << 10;

#ifdef __SANITIZE_ADDRESS__
// The address sanitizer keeps the bounds of the stack in use, so it is told of every change.
thread_local const void* scheduler_stack = nullptr;
thread_local std::size_t scheduler_stack_bytes = 0;
void leave_for(const Fiber& fiber) { __sanitizer_start_switch_fiber(nullptr, fiber.stack.get(), kStackBytes); }
void arrive_in_fiber() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes); }
void leave_for_scheduler() { __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_bytes); }
void arrive_in_scheduler() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
#else
void leave_for(const Fiber&) {}
void arrive_in_fiber() {}
void leave_for_scheduler() {}
void arrive_in_scheduler() {}
#endif

struct Block {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  ucontext_t starter;
  std::size_t current = 0;
  const std::function<void()>* kernel = nullptr;
};
thread_local Block block_of_thread;

void begin_fiber() {
  arrive_in_fiber();
  Block& block = block_of_thread;
  (*block.kernel)();
  block.fibers[block.current].state = Fiber::State::done;
  leave_for_scheduler();
  _longjmp(block.scheduler, 1);
}

void leave(Fiber::State state) {
  Block& block = block_of_thread;
  Fiber& fiber = block.fibers[block.current];
  fiber.state = state;
  if (_setjmp(fiber.at) == 0) {
    leave_for_scheduler();
    _longjmp(block.scheduler, 1);
  }
  arrive_in_fiber();
}

void enter(std::size_t i) {
  Block& block = block_of_thread;
  block.current = i;
  threadIdx = block.fibers[i].index;
  if (_setjmp(block.scheduler) == 0) {
    leave_for(block.fibers[block.current]);
    _longjmp(block.fibers[block.current].at, 1);
  }
  arrive_in_scheduler();
}

void start(std::size_t i, dim3 size) {
  Block& block = block_of_thread;
  Fiber& fiber = block.fibers[i];
  if (!fiber.stack) {
    fiber.stack = std::make_unique<std::byte[]>(kStackBytes);
  }
  const unsigned thread = static_cast<unsigned>(i);
  fiber.index = dim3(thread % size.x, thread / size.x % size.y, thread / size.x / size.y);
  fiber.state = Fiber::State::ready;
  block.current = i;
  threadIdx = fiber.index;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, begin_fiber, 0);
  if (_setjmp(block.scheduler) == 0) {
    leave_for(fiber);
    setcontext(&context);
  }
  arrive_in_scheduler();
}

// Releases those in [begin, end) if all that are not done wait in `state`.
bool release(std::size_t begin, std::size_t end, Fiber::State state) {
  Block& block = block_of_thread;
  bool any = false;
  for (std::size_t i = begin; i < end; ++i) {
    const Fiber::State now = block.fibers[i].state;
    if (now != state && (now != Fiber::State::done || state == Fiber::State::at_exchange)) {
      return false;
    }
    any = any || now == state;
  }
  for (std::size_t i = begin; i < end && any; ++i) {
    if (block.fibers[i].state == state) {
      block.fibers[i].state = Fiber::State::ready;
    }
  }
  return any;
}

void run_block(dim3 size) {
  Block& block = block_of_thread;
  const std::size_t n = std::size_t{size.x} * size.y * size.z;
  if (block.fibers.size() < n) {
    block.fibers.resize(n);
  }
  for (std::size_t i = 0; i < n; ++i) {
    start(i, size);
  }
  for (;;) {
    bool moved = release(0, n, Fiber::State::at_barrier);
    for (std::size_t warp = 0; warp < n; warp += 32) {
      moved = release(warp, std::min(n, warp + 32), Fiber::State::at_exchange) || moved;
    }
    if (!moved) {
      break;
    }
    for (std::size_t i = 0; i < n; ++i) {
      if (block.fibers[i].state == Fiber::State::ready) {
        enter(i);
      }
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    if (block.fibers[i].state != Fiber::State::done) {
      throw std::logic_error("emulated CUDA: thread " + std::to_string(i) + " waits where others do not come");
    }
  }
}

}  // namespace

void set_device(int n_devices, std::size_t memory_bytes) {
  const std::lock_guard lock(mutex);
  device_count = n_devices;
  device_bytes = memory_bytes;
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
  const std::lock_guard lock(mutex);
  stream_of(stream).queue.push_back(std::move(work));
  ++stream_of(stream).n_enqueued;
  ++n_enqueued_ever;
  if (stream_of(stream).eager) {
    run_until(stream_of(stream), stream_of(stream).n_enqueued);
  }
}

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel) {
  if (shared_bytes > kSharedBytes) {
    throw std::logic_error("emulated CUDA: too much shared memory");
  }
  block_of_thread.kernel = &kernel;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        std::fill_n(cuda::kvreplay_shared, shared_bytes / sizeof(float), std::numeric_limits<float>::quiet_NaN());
        blockIdx = dim3(x, y, z);
        run_block(block);
      }
    }
  }
}

std::uint64_t exchange(std::uint64_t bits, unsigned mask) {
  Block& block = block_of_thread;
  const std::size_t self = block.current;
  block.fibers[self].given = bits;
  leave(Fiber::State::at_exchange);  // all have given
  const std::uint64_t taken = block.fibers[self ^ mask].given;
  leave(Fiber::State::at_exchange);  // all have taken
  return taken;
}

}  // namespace kvreplay::emulation

using namespace kvreplay;
using namespace kvreplay::emulation;

void __syncthreads() { leave(Fiber::State::at_barrier); }

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "emulated error";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) {
  *n = device_count;
  return device_count > 0 ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device) { return device < device_count ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "emulated");
  properties->major = 9;
  properties->minor = 0;
  properties->sharedMemPerBlockOptin = kSharedBytes;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  const std::lock_guard lock(mutex);
  *total = device_bytes;
  *free = device_bytes > used_bytes ? device_bytes - used_bytes : 0;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  const std::lock_guard lock(mutex);
  if (used_bytes + bytes > device_bytes) {
    return cudaErrorMemoryAllocation;
  }
  used_bytes += bytes;
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*data, 0xFF, bytes);
  device_memory[static_cast<std::byte*>(*data)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  const std::lock_guard lock(mutex);
  if (data != nullptr) {
    const auto at = device_memory.find(static_cast<std::byte*>(data));
    if (at == device_memory.end()) {
      return cudaErrorInvalidValue;
    }
    used_bytes -= at->second;
    device_memory.erase(at);
    std::free(data);
  }
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** data, std::size_t bytes) {
  const std::lock_guard lock(mutex);
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  pinned_memory[static_cast<std::byte*>(*data)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) {
  const std::lock_guard lock(mutex);
  pinned_memory.erase(static_cast<std::byte*>(data));
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* data) {
  const std::lock_guard lock(mutex);
  attributes->type = inside(device_memory, data, 1)   ? cudaMemoryTypeDevice
                     : inside(pinned_memory, data, 1) ? cudaMemoryTypeHost
                                                      : cudaMemoryTypeUnregistered;
  attributes->device = 0;
  return cudaSuccess;
}

// Page-locked memory is read and written when the copy runs; pageable memory is read at once, and waited for.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  const bool up = kind == cudaMemcpyHostToDevice;
  if (!inside(device_memory, up ? to : from, bytes)) {
    return cudaErrorInvalidValue;
  }
  if (inside(pinned_memory, up ? from : to, bytes)) {
    enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  } else if (up) {
    const std::byte* begin = static_cast<const std::byte*>(from);
    enqueue(stream, [to, staged = std::vector<std::byte>(begin, begin + bytes)] {
      std::memcpy(to, staged.data(), staged.size());
    });
  } else {
    enqueue(stream, [=] { std::memcpy(to, from, bytes); });
    return cudaStreamSynchronize(stream);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t width, std::size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  if (to_pitch < width || from_pitch < width) {
    return cudaErrorInvalidValue;
  }
  cudaError_t status = cudaSuccess;
  for (std::size_t row = 0; row < height && status == cudaSuccess; ++row) {
    status = cudaMemcpyAsync(static_cast<std::byte*>(to) + row * to_pitch,
                             static_cast<const std::byte*>(from) + row * from_pitch, width, kind, stream);
  }
  return status;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static std::atomic<int> n_streams{0};
  *stream = new CUstream_st;
  (*stream)->eager = eager != nullptr && (n_streams++ % 2 == 0) == (std::strcmp(eager, "even") == 0);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  run_until(stream_of(stream), stream_of(stream).n_enqueued);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  cudaStreamSynchronize(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const std::lock_guard lock(mutex);
  if (event->stream != nullptr) {
    enqueue(stream, [other = event->stream, place = event->place] { run_until(*other, place); });
  }
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  event->stream = &stream_of(stream);
  event->place = stream_of(stream).n_enqueued;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (eager != nullptr) {  // as late as can be: when nobody has anything to enqueue any more
    std::uint64_t before = 0;
    do {
      before = n_enqueued_ever;
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    } while (before != n_enqueued_ever);
  }
  const std::lock_guard lock(mutex);
  if (event->stream != nullptr) {
    run_until(*event->stream, event->place);
  }
  return cudaSuccess;
}

cublasStatus_t cublasCreate(cublasHandle_t* handle) {
  *handle = new cublasContext;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
  handle->stream = stream;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void*, std::size_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetAtomicsMode(cublasHandle_t, cublasAtomicsMode_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }

namespace {

float element(const void* data, cudaDataType_t type, std::size_t i) {
  switch (type) {
    case CUDA_R_16F:
      return cuda::to_float(static_cast<const cuda::F16*>(data)[i]);
    case CUDA_R_16BF:
      return cuda::to_float(static_cast<const cuda::Bf16*>(data)[i]);
    case CUDA_R_32F:
      break;
  }
  return static_cast<const float*>(data)[i];
}

}  // namespace

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t a_as, cublasOperation_t b_as, int m, int n, int k,
                            const void* alpha, const void* a, cudaDataType_t a_type, int lda, const void* b,
                            cudaDataType_t b_type, int ldb, const void* beta, void* c, cudaDataType_t c_type, int ldc,
                            cublasComputeType_t, cublasGemmAlgo_t) {
  const bool transposed = a_as == CUBLAS_OP_T;
  if (b_as != CUBLAS_OP_N || lda < (transposed ? k : m) || ldb < k || ldc < m || c_type != CUDA_R_32F) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  enqueue(handle->stream, [=] {
    for (int column = 0; column < n; ++column) {
      for (int row = 0; row < m; ++row) {
        float sum = 0;
        for (int i = 0; i < k; ++i) {
          const int a_at = transposed ? row * lda + i : i * lda + row;
          sum += element(a, a_type, static_cast<std::size_t>(a_at)) *
                 element(b, b_type, static_cast<std::size_t>(column * ldb + i));
        }
        float& out = static_cast<float*>(c)[column * ldc + row];
        out = scale * sum + (keep != 0 ? keep * out : 0);  // as cuBLAS: with 0 the old value is not read
      }
    }
  });
  return CUBLAS_STATUS_SUCCESS;
}
