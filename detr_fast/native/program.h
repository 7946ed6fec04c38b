// Instructions, programs of them, and the node that a program is to autograd.
#pragma once

#include "key.h"
#include "launch.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <map>
#include <string>
#include <type_traits>

namespace host {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePtr = decltype(torch::autograd::Edge::function);  // which smart pointer that is, changed after torch 2.11

constexpr size_t kMostOperands = Launch::kMostOperands;

struct Operand {
  enum Kind { kConstant, kRegister, kAddress, kOffset, kStream } kind;
  int64_t number = 0;    // of the register; of an offset, how far it is from the call's
  int64_t distance = 0;  // of an address, bytes behind the register's own
  Object constant;
};

struct Instruction {
  enum Kind { kAllocate, kCall, kLaunch, kView, kTranspose, kProduct, kAddProduct } kind = kCall;
  Object call;
  Launch launch;
  std::vector<Operand> operands;
  std::vector<int64_t> results;
  bool several = false;  // it returns a tuple
  std::vector<int64_t> shape;
  at::TensorOptions options;
  std::vector<int64_t> dead;  // registers that nothing reads from here on
};

struct Stream {
  Object object;  // None where nothing is launched
  void* handle = nullptr;
};

struct Section {
  std::vector<Instruction> instructions;
  std::vector<int64_t> given, wanted;  // registers; of those wanted -1 for none
  size_t registers = 0;
  std::optional<Driver> driver;  // where something is launched by it

  // Without the GIL.
  void run(std::vector<Tensor>& registers, int64_t offset, const Stream& stream, int64_t device) const {
    if (driver) driver->enter(std::max<int64_t>(device, 0));
    for (const auto& one : instructions) {
      const auto tensor = [&](size_t index) -> Tensor& { return registers[one.operands[index].number]; };
      switch (one.kind) {
        case Instruction::kAllocate:
          registers[one.results[0]] = at::empty(one.shape, one.options);
          break;
        case Instruction::kCall:
          call(one, registers, offset, stream.object.get());
          break;
        case Instruction::kLaunch:
          launch(one, registers, offset, stream.handle);
          break;
        case Instruction::kView:
          registers[one.results[0]] = tensor(0).view(one.shape);
          break;
        case Instruction::kTranspose:
          registers[one.results[0]] = tensor(0).t();
          break;
        case Instruction::kProduct:
          registers[one.results[0]] = at::mm(tensor(0), tensor(1));
          break;
        case Instruction::kAddProduct:
          tensor(0).addmm_(tensor(1), tensor(2));
          break;
      }
      for (const auto r : one.dead) registers[r].reset();
    }
  }

 private:
  static uint64_t address(const Operand& operand, std::vector<Tensor>& registers) {
    return reinterpret_cast<uintptr_t>(registers[operand.number].mutable_data_ptr()) + operand.distance;
  }

  static void launch(const Instruction& one, std::vector<Tensor>& registers, int64_t offset, void* stream) {
    uint64_t given[kMostOperands];
    for (size_t i = 0; i < one.operands.size(); ++i) {
      const auto& operand = one.operands[i];
      if (operand.kind == Operand::kAddress) {
        given[i] = address(operand, registers);
      } else {
        const int64_t number = offset + operand.number;
        TORCH_CHECK(number == static_cast<int32_t>(number), "a seed's offset is ", number, ", more than a kernel takes");
        given[i] = static_cast<uint32_t>(number);
      }
    }
    one.launch.run(given, stream);
  }

  static void call(const Instruction& one, std::vector<Tensor>& registers, int64_t offset, PyObject* stream) {
    const Gil gil;
    PyObject* arguments[kMostOperands];
    Object made[kMostOperands];
    size_t fresh = 0, count = 0;
    for (const auto& operand : one.operands) {
      PyObject* argument = operand.constant.get();
      if (operand.kind == Operand::kStream) {
        argument = stream;
      } else if (operand.kind == Operand::kRegister) {
        argument = (made[fresh++] = wrapped(registers[operand.number])).get();
      } else if (operand.kind == Operand::kAddress) {
        argument = (made[fresh++] = Object::stolen(PyLong_FromUnsignedLongLong(address(operand, registers)))).get();
      } else if (operand.kind == Operand::kOffset) {
        argument = (made[fresh++] = Object::stolen(PyLong_FromLongLong(offset + operand.number))).get();
      }
      arguments[count++] = argument;
    }
    Object found = Object::stolen(PyObject_Vectorcall(one.call.get(), arguments, count, nullptr));
    if (one.several) {
      Object results = Object::stolen(PySequence_Fast(found.get(), "an operation returned no tensors"));
      TORCH_CHECK(
          static_cast<size_t>(PySequence_Fast_GET_SIZE(results.get())) == one.results.size(),
          "an operation returned another number of tensors than when it was recorded");
      for (size_t i = 0; i < one.results.size(); ++i) {
        registers[one.results[i]] = tensor_or_none(PySequence_Fast_GET_ITEM(results.get(), i));
      }
    } else if (!one.results.empty()) {
      registers[one.results[0]] = tensor_or_none(found.get());
    }
  }
};

Operand operand_of(PyObject* tuple) {
  Operand found{static_cast<Operand::Kind>(integer(item(tuple, 0)))};
  if (found.kind == Operand::kConstant) {
    found.constant = Object::borrowed(item(tuple, 1));
  } else {
    found.number = integer(item(tuple, 1));
    found.distance = integer(item(tuple, 2));
  }
  return found;
}

// (call, operands, results, several, dead). In place of what to call, a name: "empty" with operands (shape, dtype, device), "view"
// with (tensor, shape), "t", "mm" and "addmm_" with their tensors, "launch" with what a call gives, each an address or an offset,
// behind which comes what `launch_of` reads.
Instruction instruction_of(PyObject* tuple) {
  Instruction found;
  PyObject *call = item(tuple, 0), *operands = item(tuple, 1);
  if (PyUnicode_CheckExact(call)) {
    const std::string name = PyUnicode_AsUTF8(call);
    static const std::map<std::string, Instruction::Kind> kinds = {
        {"empty", Instruction::kAllocate},
        {"launch", Instruction::kLaunch},
        {"view", Instruction::kView},
        {"t", Instruction::kTranspose},
        {"mm", Instruction::kProduct},
        {"addmm_", Instruction::kAddProduct}};
    found.kind = kinds.at(name);
  } else {
    found.call = Object::borrowed(call);
  }
  Py_ssize_t tensors = Py_SIZE(operands);
  if (found.kind == Instruction::kAllocate) {
    PyObject *dtype = item(operands, 1), *device = item(operands, 2);
    TORCH_CHECK_TYPE(THPDtype_Check(dtype) && THPDevice_Check(device), "an allocation has no dtype or device");
    found.shape = integers(item(operands, 0));
    found.options = at::TensorOptions()
                        .dtype(reinterpret_cast<THPDtype*>(dtype)->scalar_type)
                        .device(reinterpret_cast<THPDevice*>(device)->device);
    tensors = 0;
  } else if (found.kind == Instruction::kView) {
    found.shape = integers(item(operands, 1));
    tensors = 1;
  } else if (found.kind == Instruction::kLaunch) {
    found.launch = launch_of(item(operands, --tensors));
  }
  for (Py_ssize_t i = 0; i < tensors; ++i) found.operands.push_back(operand_of(item(operands, i)));
  TORCH_CHECK(found.operands.size() <= kMostOperands, "an instruction has ", found.operands.size(), " operands");
  found.results = integers(item(tuple, 2));
  found.several = item(tuple, 3) == Py_True;
  found.dead = integers(item(tuple, 4));
  if (found.kind == Instruction::kLaunch) {
    const auto& given = found.operands;
    const bool fits = found.launch.places.size() == given.size() && std::all_of(given.begin(), given.end(), [](const Operand& one) {
      return one.kind == Operand::kAddress || one.kind == Operand::kOffset;
    });
    TORCH_CHECK(fits, "a launch is given something else than addresses and offsets");
  }
  return found;
}

// (instructions, registers given, registers wanted, number of registers).
Section section_of(PyObject* tuple) {
  Section found;
  PyObject* instructions = item(tuple, 0);
  for (Py_ssize_t i = 0; i < Py_SIZE(instructions); ++i) {
    found.instructions.push_back(instruction_of(item(instructions, i)));
  }
  for (const auto& one : found.instructions) {
    if (one.kind == Instruction::kLaunch) found.driver = one.launch.driver;
  }
  found.given = integers(item(tuple, 1));
  found.wanted = integers(item(tuple, 2));
  found.registers = integer(item(tuple, 3));
  return found;
}

// ---------------------------------------------------------------------------------------------------------------------
// Programs, and the node that one is to autograd.

struct Arriving {
  std::vector<int64_t> strides;
  at::ScalarType dtype;
};

struct Program {
  Section forward;
  std::map<uint64_t, Section> backwards;  // by which of the differentiable outputs a gradient arrives for, a bit each
  std::vector<int64_t> saved_output;      // of each register that is kept (they lead `forward.wanted`): which output it is, or -1
  std::vector<bool> differentiable;       // of each output
  std::vector<Arriving> arriving;         // of each differentiable output
  bool several = false;                   // outputs are returned as a tuple
  bool strict = false;                    // a backward that somebody looks at, or that is odd, goes to `slow`
  Object slow;                            // (offset, extra, kept, arriving) -> gradients, by ops that can be differentiated
  Object stream;                          // none, or what takes `device_number` and gives its current stream
  Object device_number;
  int64_t device = -1;                    // of the GPU, or -1
};

PyTypeObject* program_type = nullptr;

bool is_program(PyObject* object) { return Py_TYPE(object) == program_type; }

bool on_current_device(int64_t device) {
  return device < 0 || c10::impl::getDeviceGuardImpl(at::kCUDA)->getDevice().index() == device;
}

Stream current_stream(const Program& program) {
  if (!program.stream) return {Object::borrowed(Py_None)};
  Stream found{Object::stolen(PyObject_CallOneArg(program.stream.get(), program.device_number.get()))};
  found.handle = PyLong_AsVoidPtr(found.object.get());
  if (found.handle == nullptr && PyErr_Occurred()) throw python_error();
  return found;
}

// Below autograd, and with what autocast casts already cast.
struct Plainly {
  at::AutoDispatchBelowAutograd below;
  c10::impl::ExcludeDispatchKeyGuard uncast{c10::autocast_dispatch_keyset};
};

struct HostNode : Node {
  Object owner, extra;
  int64_t offset = 0;
  std::vector<SavedVariable> saved;
  bool released = false;

  const Program& program() const { return held<Program>(owner.get()); }

  ~HostNode() override {
    if (Py_IsInitialized()) {
      Gil gil;
      owner = extra = Object();
    } else {
      owner.release();
      extra.release();
    }
  }

  std::string name() const override { return program().strict ? "OpProgramBackward" : "ProgramNodeBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    saved.clear();
    released = true;
  }

  variable_list apply(variable_list&& arriving) override {
    const auto edges = num_outputs();
    std::vector<Tensor> kept;
    {  // without the GIL, which others may hold while they wait for this
      std::lock_guard<std::mutex> lock(mutex_);
      TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
      kept.reserve(saved.size());
      for (const auto& one : saved) kept.push_back(one.unpack(getptr()));
    }
    uint64_t pattern = 0;
    for (size_t i = 0; i < arriving.size(); ++i) pattern |= static_cast<uint64_t>(arriving[i].defined()) << i;
    if (pattern == 0) return variable_list(edges);
    Gil gil;
    try {
      const auto backward = program().backwards.find(pattern);
      const bool again = at::GradMode::is_enabled() || backward == program().backwards.end() ||
          !on_current_device(program().device) || (program().strict && seen());
      if (!again && taken(arriving)) return fast(backward->second, kept, arriving, edges);
      return slowly(kept, arriving, edges);
    } catch (python_error& error) {
      error.persist();
      throw;
    }
  }

 private:
  // Whether what arrives is as it was recorded; a layout that is not is made so, or, in a strict program, sent away.
  bool taken(variable_list& arriving) const {
    for (size_t i = 0; i < arriving.size(); ++i) {
      auto& dy = arriving[i];
      if (!dy.defined()) continue;
      const auto& expected = program().arriving[i];
      if (!is_memory(dy) || dy.scalar_type() != expected.dtype) return false;
      const bool aligned = reinterpret_cast<uintptr_t>(dy.const_data_ptr()) % kAlignment == 0;
      if (aligned && dy.strides() == at::IntArrayRef(expected.strides)) continue;
      if (program().strict) return false;
      const Released released;
      auto fitting = at::empty_strided(dy.sizes(), expected.strides, dy.options());
      fitting.copy_(dy);
      dy = fitting;
    }
    return true;
  }

  variable_list fast(const Section& backward, std::vector<Tensor>& kept, variable_list& arriving, size_t edges) const {
    std::vector<Tensor> registers(backward.registers);
    size_t next = 0;
    for (auto& one : kept) registers[backward.given[next++]] = std::move(one);
    for (auto& one : arriving) {
      if (one.defined()) registers[backward.given[next++]] = std::move(one);
    }
    const auto stream = current_stream(program());
    const Plainly plainly;
    const Released released;
    backward.run(registers, offset, stream, program().device);
    variable_list gradients(edges);
    for (size_t i = 0; i < edges; ++i) {
      if (backward.wanted[i] >= 0) gradients[i] = registers[backward.wanted[i]];
    }
    return gradients;
  }

  variable_list slowly(const std::vector<Tensor>& kept, const variable_list& arriving, size_t edges) const {
    std::vector<Tensor> given(program().differentiable.size());  // for all outputs
    size_t next = 0;
    for (size_t i = 0; i < given.size(); ++i) {
      if (program().differentiable[i]) given[i] = arriving[next++];
    }
    const auto at_offset = Object::stolen(PyLong_FromLongLong(offset));
    const auto saved_tuple = tuple_of(kept), given_tuple = tuple_of(given);
    PyObject* arguments[] = {at_offset.get(), extra.get(), saved_tuple.get(), given_tuple.get()};
    const auto found = Object::stolen(PyObject_Vectorcall(program().slow.get(), arguments, 4, nullptr));
    const auto results = Object::stolen(PySequence_Fast(found.get(), "a backward returned no sequence"));
    TORCH_CHECK(static_cast<size_t>(PySequence_Fast_GET_SIZE(results.get())) == edges, "a backward returned too few gradients");
    variable_list gradients(edges);
    for (size_t i = 0; i < edges; ++i) gradients[i] = tensor_or_none(PySequence_Fast_GET_ITEM(results.get(), i));
    return gradients;
  }
};

template <class Pointer, class Made>
auto new_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    // which, unlike `delete`, needs no stack for a long graph
    using Base = std::conditional_t<std::is_base_of_v<Node, Made>, Node, Made>;  // looked up when this is made, not before
    return std::shared_ptr<Made>(new Made, [](Made* node) { deleteNode(static_cast<Base*>(node)); });
  } else {
    return c10::make_intrusive<Made>();
  }
}

// Lets hooks on the creation of nodes see a whole one; there are none before torch 2.14.
template <class Pointer>
void announce(const Pointer& node) {
  if constexpr (requires { fire_node_creation_hooks(node); }) fire_node_creation_hooks(node);
}

// What the program gives for these inputs (undefined for None): a tensor, or a tuple of them.
PyObject* run(const Object& owner, const std::vector<Tensor>& inputs, int64_t offset, const Object& extra) {
  const auto& program = held<Program>(owner.get());
  const auto& forward = program.forward;
  std::vector<Tensor> registers(forward.registers);
  for (size_t i = 0; i < inputs.size(); ++i) registers[forward.given[i]] = inputs[i];
  {
    const auto stream = current_stream(program);
    const Plainly plainly;
    const Released released;
    forward.run(registers, offset, stream, program.device);
  }
  const size_t kept = program.saved_output.size();
  std::vector<Tensor> outputs;
  for (size_t i = kept; i < forward.wanted.size(); ++i) outputs.push_back(registers[forward.wanted[i]]);
  if (!program.backwards.empty()) {
    auto node = new_node<NodePtr, HostNode>();
    node->owner = owner;
    node->extra = extra;
    node->offset = offset;
    node->set_next_edges(torch::autograd::collect_next_edges(inputs));
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (program.differentiable[i]) torch::autograd::set_history(outputs[i], node);
    }
    node->saved.reserve(kept);
    for (size_t i = 0; i < kept; ++i) {
      const auto output = program.saved_output[i];
      const bool own = output >= 0 && program.differentiable[output];
      node->saved.emplace_back(output >= 0 ? outputs[output] : registers[forward.wanted[i]], own);
    }
    announce(node);
  }
  return program.several ? tuple_of(outputs).release() : wrapped(outputs[0]).release();
}

// Program(forward, backwards, saved_output, differentiable, arriving, several, strict, slow, stream, device)
PyObject* program_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  auto program = std::make_unique<Program>();
  program->forward = section_of(item(arguments, 0));
  PyObject *backwards = item(arguments, 1), *arriving = item(arguments, 4);
  for (Py_ssize_t i = 0; i < Py_SIZE(backwards); ++i) {
    PyObject* pair = item(backwards, i);
    program->backwards.emplace(static_cast<uint64_t>(integer(item(pair, 0))), section_of(item(pair, 1)));
  }
  program->saved_output = integers(item(arguments, 2));
  for (const auto one : integers(item(arguments, 3))) program->differentiable.push_back(one != 0);
  for (Py_ssize_t i = 0; i < Py_SIZE(arriving); ++i) {
    PyObject* pair = item(arriving, i);
    program->arriving.push_back({integers(item(pair, 0)), reinterpret_cast<THPDtype*>(item(pair, 1))->scalar_type});
  }
  program->several = item(arguments, 5) == Py_True;
  program->strict = item(arguments, 6) == Py_True;
  program->slow = Object::borrowed(item(arguments, 7));
  if (item(arguments, 8) != Py_None) program->stream = Object::borrowed(item(arguments, 8));
  program->device_number = Object::borrowed(item(arguments, 9));
  program->device = integer(item(arguments, 9));
  return new_holder(type, std::move(program));
  END_HANDLE_TH_ERRORS
}

// program.run(offset, extra, *inputs)
PyObject* program_run(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto expected = held<Program>(self).forward.given.size();
  TORCH_CHECK_TYPE(
      count >= 2 && static_cast<size_t>(count - 2) == expected,
      "got ", count, " arguments; expected an offset, what is given to a slow backward, and ", expected, " inputs");
  std::vector<Tensor> inputs;
  inputs.reserve(count);
  for (Py_ssize_t i = 2; i < count; ++i) inputs.push_back(tensor_or_none(arguments[i]));
  return run(Object::borrowed(self), inputs, integer(arguments[0]), Object::borrowed(arguments[1]));
  END_HANDLE_TH_ERRORS
}

}  // namespace host
