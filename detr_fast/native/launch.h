// Launches by CUDA's driver, of kernels whose arguments are kept as bytes (see `kernels.driver`).
#pragma once

#include "objects.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>

namespace host {

// CUlaunchAttribute and CUlaunchConfig of cuda.h, which need not be installed.
struct Attribute {
  int id;
  alignas(8) int value;
  char rest[60];
};
static_assert(sizeof(Attribute) == 72 && offsetof(Attribute, value) == 8);

struct Configuration {
  unsigned x, y, z, threads_x, threads_y, threads_z, shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
};
static_assert(offsetof(Configuration, stream) == 32 && sizeof(Configuration) == 56);

constexpr int kProgrammaticStreamSerialization = 6;

// Functions of libcuda, by their addresses, in the order of `kernels.driver.FUNCTIONS`.
struct Driver {
  int (*launch)(const Configuration* how, void* function, void** parameters, void** extra) = nullptr;
  int (*describe)(int error, const char** text) = nullptr;
  int (*current_context)(void** context) = nullptr;
  int (*device)(int* device, int ordinal) = nullptr;
  int (*primary_context)(void** context, int device) = nullptr;
  int (*set_context)(void* context) = nullptr;

  // Raises as Triton's launcher does.
  void check(int error) const {
    if (error == 0) return;
    const char* text = nullptr;
    describe(error, &text);
    throw std::runtime_error(std::string("Triton Error [CUDA]: ") + (text == nullptr ? "unknown error" : text));
  }

  // A thread that has called nothing of CUDA's has no context, and one of autograd's may be such.
  void enter(int64_t ordinal) const {
    void* context = nullptr;
    check(current_context(&context));
    if (context != nullptr) return;
    int number = 0;
    check(device(&number, static_cast<int>(ordinal)));
    check(primary_context(&context, number));
    check(set_context(context));
  }
};

struct Launch {
  Driver driver;
  void* function = nullptr;
  Object program;  // keeps the function loaded
  unsigned x = 0, y = 0, z = 0, threads = 0, shared = 0;
  unsigned overlaps = 0;             // whether it may start before what is launched ahead of it ends
  std::vector<uint64_t> parameters;  // one word each, of which a smaller one takes the first bytes
  std::vector<size_t> places;        // of those that a call gives, in the order of its operands

  void run(const uint64_t* given, void* stream) const {
    uint64_t values[kMostOperands];
    void* pointers[kMostOperands];
    std::copy(parameters.begin(), parameters.end(), values);
    for (size_t i = 0; i < places.size(); ++i) values[places[i]] = given[i];
    for (size_t i = 0; i < parameters.size(); ++i) pointers[i] = values + i;
    Attribute overlap{kProgrammaticStreamSerialization, 1, {}};
    const Configuration how{x, y, z, threads, 1, 1, shared, stream, &overlap, overlaps};
    driver.check(driver.launch(&how, function, pointers, nullptr));
  }

  static constexpr size_t kMostOperands = 128;
};

// (addresses of the driver's functions, (function, x, y, z, threads, shared, overlaps), bytes of the parameters, places, what keeps it loaded)
Launch launch_of(PyObject* tuple) {
  Launch found;
  const auto addresses = integers(item(tuple, 0)), numbers = integers(item(tuple, 1));
  static_assert(sizeof(Driver) % sizeof(void*) == 0);
  TORCH_CHECK(addresses.size() * sizeof(void*) == sizeof(Driver) && numbers.size() == 7, "a launch is not as it should be");
  std::memcpy(&found.driver, addresses.data(), sizeof(Driver));
  found.function = reinterpret_cast<void*>(numbers[0]);
  unsigned* const rest[] = {&found.x, &found.y, &found.z, &found.threads, &found.shared, &found.overlaps};
  for (size_t i = 0; i < 6; ++i) *rest[i] = static_cast<unsigned>(numbers[i + 1]);
  char* bytes = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(item(tuple, 2), &bytes, &size) < 0) throw python_error();
  found.parameters.resize(size / sizeof(uint64_t));
  std::memcpy(found.parameters.data(), bytes, found.parameters.size() * sizeof(uint64_t));
  for (const auto place : integers(item(tuple, 3))) found.places.push_back(place);
  found.program = Object::borrowed(item(tuple, 4));
  const bool fits = found.parameters.size() <= Launch::kMostOperands &&
      std::all_of(found.places.begin(), found.places.end(), [&](size_t place) { return place < found.parameters.size(); });
  TORCH_CHECK(fits, "a launch has ", found.parameters.size(), " parameters, or a place behind them");
  return found;
}

}  // namespace host
