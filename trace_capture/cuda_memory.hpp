// Page-locked host memory for the recorder's slots, which a device copies into without waiting for the host.
#pragma once
#include "trace_capture/recorder.hpp"

namespace kvreplay {

// allocate() throws DeviceError where there is no device or not enough memory can be locked.
SlotMemory pinned_memory();

}  // namespace kvreplay
