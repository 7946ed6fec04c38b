// libcuda as far as Triton's launcher and ours call it to launch: writes down what they ask for, as text.
#include <cuda.h>
#include <stdio.h>
#include <string.h>

static char record[1 << 14];
static size_t sizes[64];
static int count;
static int quiet;
static CUcontext context = (CUcontext)1;

void fake_parameters(int number, const size_t *bytes) {
  count = number;
  memcpy(sizes, bytes, number * sizeof(size_t));
}

const char *fake_record(void) { return record; }

void fake_quiet(void) { quiet = 1; }  // launches are free

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  if (quiet) return CUDA_SUCCESS;
  const unsigned shape[] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ};
  char *at = record;
  for (int i = 0; i < 6; ++i) at += sprintf(at, "%u ", shape[i]);
  at += sprintf(at, "shared %u stream %p function %p", c->sharedMemBytes, (void *)c->hStream, (void *)function);
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) return CUDA_ERROR_NOT_SUPPORTED;
    at += sprintf(at, " overlaps %d", c->attrs[i].value.programmaticStreamSerializationAllowed);
  }
  for (int i = 0; i < count; ++i) {
    at += sprintf(at, " ");
    for (size_t b = 0; b < sizes[i]; ++b) at += sprintf(at, "%02x", ((unsigned char *)parameters[i])[b]);
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t *offset, size_t *size) {
  if (index >= (size_t)count) return CUDA_ERROR_INVALID_VALUE;
  *size = sizes[index];
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext given) {
  context = given;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice device) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return CUDA_SUCCESS; }
